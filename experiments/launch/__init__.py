"""Start a run on many machines: the script that every process executes, and what starts it on a pod or a cluster."""
