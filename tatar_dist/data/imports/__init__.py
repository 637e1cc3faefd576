"""Turn annotation files into manifests: `tatar-dist data import`.

annotations.py   reads CSV, text, JSON and Excel into columns and recognises their format
attributes.py    attribute texts of images
folder.py        resolves image names to files
rows.py          values to rows: scores mapped by the declared range, votes, texts; checks between rows
splits.py        train, validation and test
importer.py      the command: reads the files, makes one table of them, writes the manifest
"""
