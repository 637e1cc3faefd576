"""Groups of sub-commands: `tatar-dist data …` and `tatar-dist rationale …`. Like cli.py: parse, call, print."""
