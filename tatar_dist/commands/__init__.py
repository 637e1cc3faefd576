"""The sub-commands of `tatar-dist`. Each parses its words, calls the package, prints; heavy imports are inside."""
