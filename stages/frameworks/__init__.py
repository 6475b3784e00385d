"""Training loops: one package per framework, with the function `fit`. stages/train/stage.py imports the chosen one."""
