"""Optimizers and learning-rate schedules, as conf/optimizer and conf/scheduler name them."""
