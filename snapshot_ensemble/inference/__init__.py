"""From members to outputs.

`x` comes in through `ensemble.predict` and goes to `member_pool`, which picks the members and the
graph that runs them; `members_model` is that graph, and `combining` makes one output of theirs.
May import `storage` and `keras_compat`.
"""
