"""The networks of CALM: encoder, multi-scale alignment, language model. Imports the config only."""
