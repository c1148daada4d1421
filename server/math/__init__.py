"""The judge of LaTeX answers: an HTTP server that says whether two answers are equal.

`python -m server.math` starts it, `client` asks it. A pair passes `server` (HTTP), `judge` (quick
stages, cache), `pool` and `worker` (processes with limits) to `equivalence`: `normalise`, `phrases`
and `units` give one spelling to a string, `tokens` and `tree` parse it, `tidy` makes trees alike,
`structures`, `regions`, `values`, `evaluate` compare; `symbolic` is math-verify; `metrics` counts.
"""
