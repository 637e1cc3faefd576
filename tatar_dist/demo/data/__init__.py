"""Make the demo's data set: crops of real photographs with computed targets.

photos.py        photographs, their provenance and split
scenes.py        crop geometry, pasted subjects, grading
distortions.py   distortions and the quality target
aesthetics.py    measured attributes and the aesthetic target
texts.py         rationales and attribute texts
styles.py        rationales in the other task's style, for the probes
make.py          manifest writer
"""
