"""Make the demo's data set: crops of real photographs with computed targets.

photos.py, photos.yaml   photographs, their provenance and split; crops, pasted subjects, grading
distortions.py           distortions and the quality target
aesthetics.py            measured attributes and the aesthetic target
texts.py, texts.yaml     rationales and attribute texts
make.py                  manifest writer; rationales in the other task's style, for the probes
"""
