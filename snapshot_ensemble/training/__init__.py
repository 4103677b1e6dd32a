"""One call of `fit`, from its arguments to its last snapshot.

    ensemble.fit(x, y, epochs=50)
        schedules.plan_of_fit   epochs -> the plan: cycles, each with its first and last epoch
        session                 claims the directory or resumes; commits, or leaves all as it was
            run                 the plan, and how far it has come
            loop                the whole plan in one `model.fit`
                learning_rate   the rate of each step, in the training graph
                shrink_perturb  what a restart carries over
                store.add       a snapshot at the end of each cycle

May import `inference`, `storage`, `schedules` and `keras_compat`.
"""
