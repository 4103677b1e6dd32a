"""One call of `fit`, from its arguments to its last snapshot.

`ensemble.fit` turns `epochs` into a plan (see `schedules`). `session` claims the directory and
starts or resumes the run, and `loop` runs the whole plan in one `model.fit`. May import
`inference`, `storage`, `schedules` and `keras_compat`.
"""
