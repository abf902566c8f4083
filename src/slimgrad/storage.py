class S:
    def close(self):
        pass


def open_store(d, f):
    return S()


def measure_bandwidth(s):
    return 1e9, 1e9
