"""Ray: which cluster a job runs on, what each worker gets, and the loop inside a worker."""
