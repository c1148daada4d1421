"""The judge of LaTeX answers: an HTTP server that says whether two answers are equal.

A pair of answers passes through the modules in this order:

    client       asks the server, from Python or the command line
    server       the HTTP interface and the settings; `python -m server.math` starts it
    judge        the quick stages, else the cache, else a job for the pool
    pool         worker processes with limits of time and memory
    worker       what runs in these processes
    equivalence  the stages, the cheap ones first; the modules below are their parts
    normalise    a string → one spelling of it
    notations    the rules of that for what few answers hold
    phrases      numbers and stock phrases in words → signs
    units        the unit at the end, taken off and compared by name
    tokens       a string → tokens
    tree         tokens → a tree
    evaluate     a tree → its value, exact or with 60 digits
    values       two expressions, compared by value
    structures   two trees, compared part by part: lists, tuples, sets, matrices, relations
    families     two families over the integers, compared as sets
    tidy         several notations → one tree
    regions      two sets of real numbers, compared by membership
    symbolic     two strings, compared by math-verify

Beside them are `vocabulary` (the words and signs of answers), `metrics` (for Prometheus) and
`openapi` (the description of the interface). `equivalence.judge` works without a server.
"""
