import time, torch
from castore.tensors import allocate, flatten
M=1<<20
def t(f,n=3):
    b=9
    for _ in range(n):
        torch.cuda.synchronize(); s=time.perf_counter(); f(); torch.cuda.synchronize(); b=min(b,time.perf_counter()-s)
    return b
for name,x in {"plain":torch.randn(64*M//4*4,device="cuda"),"t":torch.randn(8192,8192,device="cuda").t(),"cl":torch.randn(256,512,16,16,device="cuda").contiguous(memory_format=torch.channels_last)}.items():
    f=flatten(x); p=f.payloads[0]
    for step in (M,16*M):
        b=t(lambda:[p.read(s,min(s+step,p.raw_bytes)) for s in range(0,p.raw_bytes,step)])
        v,tg=allocate(f.entries[0],device="cuda"); d=bytes(step)
        w=t(lambda:[tg.write(s,d[:min(step,p.raw_bytes-s)]) for s in range(0,p.raw_bytes,step)])
        print(name,step//M,"MiB read GB/s",round(p.raw_bytes/b/1e9,2),"write",round(p.raw_bytes/w/1e9,2))
x=torch.randn(64*M,device="cuda"); h=torch.empty(64*M,pin_memory=True)
print("whole pageable",round(x.nbytes/t(lambda:x.cpu())/1e9,2),"pinned",round(x.nbytes/t(lambda:h.copy_(x))/1e9,2))
