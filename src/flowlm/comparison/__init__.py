"""Models of several families side by side, at equal training compute and by the same judges: `flowlm compare`."""
