"""Everything that is learned or measured on held-out data.

`held_out` runs the members over the data once; reports, member weights, the temperature and
averaged weights are all derived from what it returns. May import `inference`, `storage` and
`keras_compat`.
"""
