"""The pipeline's stages, one module each, and the plain modules that they share."""
