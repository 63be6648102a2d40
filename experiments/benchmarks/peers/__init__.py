"""Our speed beside that of TRL, diffusers, transformers and vLLM: the same work, side by side, in one run.

`work.py` says what is done, `cases.py` which work is measured, `ours.py`, `trl_side.py`, `diffusers_side.py`,
`transformers_side.py` and `vllm_side.py` do it, each in a process of its own (`processes.py`); `summary.py` compares.
What a peer's process loads knows nothing of JAX: peers have an environment of their own.
"""
