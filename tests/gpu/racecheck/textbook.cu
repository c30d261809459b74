// The textbook producer and consumer: two slots, full and empty mbarriers, every thread of the producing half stores and
// arrives, every thread of the consuming half waits, loads and arrives.
#include <cstdint>
#include <cstdio>
__device__ void init(uint64_t *b, int n) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"((uint32_t)__cvta_generic_to_shared(b)), "r"(n) : "memory"); }
__device__ void arrive(uint64_t *b) { asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }" ::"r"((uint32_t)__cvta_generic_to_shared(b)) : "memory"); }
__device__ void wait(uint64_t *b, int parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again; }" ::"r"((uint32_t)__cvta_generic_to_shared(b)), "r"(parity) : "memory");
}
__global__ void textbook(int *out, int steps) {
  __shared__ int slots[2][128];
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0) for (int s = 0; s < 2; s++) { init(&full[s], 128); init(&empty[s], 128); }
  __syncthreads();
  int i = threadIdx.x % 128, sum = 0;
  if (threadIdx.x < 128) {
    for (int n = 0; n < steps; n++) { wait(&empty[n % 2], ((n / 2) & 1) ^ 1); slots[n % 2][i] = n + i; arrive(&full[n % 2]); }
  } else {
    for (int n = 0; n < steps; n++) { wait(&full[n % 2], (n / 2) & 1); sum += slots[n % 2][127 - i]; arrive(&empty[n % 2]); }
    out[i] = sum;
  }
}
int main() {
  int *out, host[128], bad = 0;
  cudaMalloc(&out, 512);
  textbook<<<1, 256>>>(out, 16);
  cudaMemcpy(host, out, 512, cudaMemcpyDeviceToHost);
  for (int i = 0; i < 128; i++) bad += host[i] != 120 + 16 * (127 - i);
  printf("cuda textbook: %d wrong, %s\n", bad, cudaGetErrorString(cudaGetLastError()));
}
