"""Files, folders and globs in; what a model says about each picture, as a table or a contact sheet, out."""
