"""Guards that keep an engine whole: threads and forks, Ctrl-C, foreign templates, collections."""
