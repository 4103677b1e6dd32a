"""Everything that is learned or measured on held-out data.

`held_out` predicts the data with all members in one pass; reports, member weights, the temperature
and averaged weights are derived from what it returns. May import `inference`, `storage` and
`keras_compat`.
"""
