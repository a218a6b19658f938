"""stub"""


def refuse_plot(path):
    pass
