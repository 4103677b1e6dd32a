"""Prediction with the members.

`member_pool` selects the members and the graph that runs them, `members_model` is that graph, and
`combining` combines the members' outputs into one. May import `storage` and `keras_compat`.
"""
