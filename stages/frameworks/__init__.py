"""Training loops: one package each, behind the function `fit`; stages/train/stage.py imports the chosen one."""
