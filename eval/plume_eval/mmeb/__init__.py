"""MMEB-V2: 78 tasks of images, video and visual documents."""
