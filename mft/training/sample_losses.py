def read(folder, split, step):
    return None
