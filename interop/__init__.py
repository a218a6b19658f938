"""Every format, every scheme it holds, every reader: `python -m interop`."""
