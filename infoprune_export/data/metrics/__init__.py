"""The benchmarks' own measures of an answer, as their official scripts compute them."""
