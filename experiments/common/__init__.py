"""What the experiments share: phases that are not repeated, files, results, the command line."""
