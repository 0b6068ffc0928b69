import time
def test_a(tiny_sd1, tiny_sd2v, tiny_sdxl): pass
def test_b(tiny_sd1_bundle):
    import subprocess; print(subprocess.run(["find",str(tiny_sd1_bundle),"-type","f","-size","+0","-printf","%p %s\n"],capture_output=True,text=True).stdout)
    print((tiny_sd1_bundle/"bundle.json").read_text()[:5000])
def test_c(tiny_sdxl_bundle): pass
def test_d(tiny_sd2v_bundle): pass
