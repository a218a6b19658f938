"""The one place that names the version: the package's metadata, `--version` and every journal read it."""

VERSION = "0.1.0"
