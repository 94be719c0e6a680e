"""Train a compactor: the row format, the data that `still data` makes, the loss, and the loop of `still train`."""
