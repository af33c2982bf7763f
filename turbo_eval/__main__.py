"""`python -m turbo_eval`: the same as the console script."""

from turbo_eval.entry import main

main()
