"""fastlora next to its peers: one linear, stacks of experts, peft's options, the cost of a call, the floor model."""
