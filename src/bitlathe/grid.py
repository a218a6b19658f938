"""stub"""

from rich.table import Table


def allocation_grid(linears):
    return Table("stub")
