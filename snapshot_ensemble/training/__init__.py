"""One `fit`, from its arguments to its last snapshot.

`epochs` comes in through `ensemble.fit`, becomes a plan in `schedules`, and is handed with the data
to `session`, which claims the directory and starts or resumes the run; `loop` then makes one
`model.fit` of it. May import `inference`, `storage`, `schedules` and `keras_compat`.
"""
