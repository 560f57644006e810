"""Class-conditional models of CIFAR-10, of the published size and of one that two cores can train; none is shipped."""
