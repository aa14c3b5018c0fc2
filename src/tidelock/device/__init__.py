"""The person's side: the model to train and its PEFT modules."""
