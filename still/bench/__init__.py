"""What `still bench` measures: for each operation its cases, every way to compute them, and the floor of each.

An operation is a module here with `cases(device, dtype, tokens) -> Iterator[Case]`.
"""

OPERATIONS = ("rope", "latent_attention", "prefix_attention")
