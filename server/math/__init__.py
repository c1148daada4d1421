"""The judge of LaTeX answers: an HTTP server that says whether two answers are equal.

`python -m server.math` starts it, `client` asks it. A pair passes through `server` (HTTP), `judge`
(the quick stages, else the cache), `pool` and `worker` (processes with limits) to `equivalence`,
which works without a server, too: `normalise`, `phrases` and `units` give one spelling to a string,
`tokens` and `tree` parse it, `tidy` gives one form to trees, `structures`, `regions`, `values` and
`evaluate` compare them, `constants` general solutions; `symbolic` asks math-verify. Tables hold
the rules and words (TOML) and the interface (JSON); `metrics` counts.
"""
