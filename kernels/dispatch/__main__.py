"""`python -m stepforge.kernels.dispatch` writes table.json again."""

from stepforge.kernels.dispatch.choose import write_table

write_table()
