"""From members to outputs.

    ensemble.predict(x)
        member_pool             which members; all in one graph, or one after another
            one_by_one          one model that gets the weights of each member in turn
            batch_size          how many rows of x at once
            members_model       x -> each member's outputs; layers that they share run once
            combining           the members' outputs -> one output, as `output_specs` reads it

May import `storage` and `keras_compat`.
"""
