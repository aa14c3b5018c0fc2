"""Which PEFT modules are active when: pure decisions on frozen facts."""
