"""Turn annotation files into manifests: `tatar-dist data import`.

annotations.py   reads CSV, text, JSON and Excel into columns and recognises their format
scores.py        raw scores, spreads and votes to numbers, mapped by the declared range
attributes.py    attribute texts of images
folder.py        resolves image names to files
rows.py          all rows of an import, and checks between them
splits.py        train, validation and test
importer.py      the command: reads the files, makes one table of them, writes the manifest
"""
