"""The benchmark harness: runs the scripts of algos/ as processes and reads the files they write."""
