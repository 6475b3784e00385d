"""What trains a model: a module each, behind one function `fit`, of which stages/train.py imports the chosen one."""
