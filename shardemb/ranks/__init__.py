"""One store for several processes of a training job, its ranks; users import `shardemb.torch.Ranks`."""
