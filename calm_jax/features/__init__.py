"""What the frozen part of a model makes of a picture: computed once, then kept on disk.

A frozen encoder gives the same features of the same picture in every epoch, process and experiment. `store` keeps
bytes under keys, bounded and safe with many processes; `keys` says what a picture's features depend on; `encoding`
computes what is not there yet; `frozen` makes an encoding of a model's visual encoder, with its MFAM or without.
"""
