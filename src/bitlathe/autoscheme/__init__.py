"""AutoScheme: which linear gets which scheme, for an average of so many bits a weight.

`space` says what may be chosen, `score` predicts what every option loses, `allocate` solves for the budget, `measure` finds the
true KL divergence of whole choices, and `choose` puts them together. `kept` makes sure that nothing is computed twice.
"""
