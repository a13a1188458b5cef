import sys
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from fused_flow_checks import bf16_copy, expert_of_pi05, random_cache, random_expert
import safe_pruner_node.engine.resident_flow as rf
from resident_flow_checks import milliseconds
from safe_pruner_node.engine.flow import FlowSchedule
from safe_pruner_node.engine.prompt import Prompt
print(torch.cuda.get_device_name())
policy = bf16_copy(random_expert(expert_of_pi05(), "cuda"))
NAMES = {0:"top",40:"Q w",41:"Q x",2:"Q loop",3:"Q end",6:"A first",36:"A all S",37:"A S done",33:"A softmax",39:"A values",34:"A smem",35:"A stage",7:"A end",10:"J wait",56:"J joined",11:"J announce",44:"O w",45:"O x",15:"O loop",48:"O write",57:"O arrive",49:"O await",50:"O own",51:"O scaled",16:"O announce",42:"G w",43:"G x",21:"G loop",59:"G scale",60:"G gelu",22:"G end",46:"D w",47:"D x",27:"D loop",52:"D write",58:"D arrive",53:"D await",54:"D own",55:"D scaled",29:"D announce",38:"advance"}
VARIANTS = [{}]
def persist(mib):
    from cuda.bindings import driver
    print("persisting L2", mib, driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE, mib << 20), driver.cuCtxGetLimit(driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE))
def clocks(pruned, horizon=50):
    slots, late = 128, 192 if pruned else 768
    cache = random_cache(policy.config, [768+slots]*3+[late+slots]*15, "cuda", torch.bfloat16)
    noise = torch.randn(1, horizon, 32, device="cuda")
    prompt = Prompt(torch.zeros(1, slots, dtype=torch.long, device="cuda"), torch.tensor(slots-8, device="cuda"))
    flow, schedule = rf.ResidentFlow(policy), FlowSchedule(policy, 10)
    with torch.inference_mode():
        for _ in range(3):
            flow.denoise(schedule, 768, None, cache, noise, None, prompt)
    torch.cuda.synchronize()
    c = flow.clocks.double() / 180
    order = [i for i in NAMES if i not in (38,)]
    start = order.index(0)
    groups = {"0-7": slice(0, 8), "8-47": slice(8, 48), "48-119": slice(48, 120), "120-127": slice(120, 128)}
    t = {g: 0.0 for g in groups}
    for i in order:
        line = f"{NAMES[i]:12s}"
        for g, r in groups.items():
            v = c[r, i]
            t[g] += float(v.mean())
            line += f" | {v.mean():6.0f} ({v.min():6.0f} {v.max():6.0f}) at {t[g]:7.0f}"
        print(line)
VARIANTS = [{"X_PIECES": 2, "PREFETCH": 0}]
def persist(mib):
    from cuda.bindings import driver
    print("persisting L2", mib, driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE, mib << 20), driver.cuCtxGetLimit(driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE))
def clocks(pruned, horizon=50):
    slots, late = 128, 192 if pruned else 768
    cache = random_cache(policy.config, [768+slots]*3+[late+slots]*15, "cuda", torch.bfloat16)
    noise = torch.randn(1, horizon, 32, device="cuda")
    prompt = Prompt(torch.zeros(1, slots, dtype=torch.long, device="cuda"), torch.tensor(slots-8, device="cuda"))
    flow, schedule = rf.ResidentFlow(policy), FlowSchedule(policy, 10)
    with torch.inference_mode():
        for _ in range(3):
            flow.denoise(schedule, 768, None, cache, noise, None, prompt)
    torch.cuda.synchronize()
    c = flow.clocks.double() / 180
    print("total per layer", float(c[:, :63].sum(1).mean()))
    for i, name in sorted(NAMES.items(), key=lambda p: list(NAMES).index(p[0])):
        v = c[:, i]
        print(f"{name:12s} mean {v.mean():7.0f} min {v.min():7.0f} max {v.max():7.0f}")
if "check" in sys.argv:
    from resident_flow_checks import check
    check()
for mib in (0,):
  for extra in VARIANTS:
    rf.EXTRA = extra
    for which in ({}, {"pruned": True}, {"deep": True}, {"horizon": 10}):
        print(extra, which, "p50 %.3f p99 %.3f" % milliseconds(policy, **which), flush=True)

