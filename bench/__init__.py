"""Speed and memory of the operators, measured with one protocol: `python -m bench --help`."""
