# Start of the tiny guest: from the BIOS in 16-bit mode to main() in 32-bit mode.
#
# The same bytes are the no-emulation boot image of the CD (El Torito: the BIOS loads all of it to 0x7c00) and the first
# sectors of the ISO file (a BIOS that starts the file as a hard disk loads only the first sector, and the code below
# fetches the rest with INT 13h, function 42h).

        .set    LOAD_ADDRESS, 0x7c00
        .set    SECTORS, 32             # size of the program on the medium, 16 KiB; link.ld checks it
        .set    CODE_SELECTOR, 0x08
        .set    DATA_SELECTOR, 0x10
        .set    FIRST_IRQ, 0x20         # interrupt vector of IRQ 0; the sixteen IRQs follow each other
        .set    VECTORS, 0x30

        .code16
        .section .start, "ax"
        .globl  _start
_start:
        ljmp    $0, $1f                 # some BIOSes come in as 07c0:0000
1:      cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $LOAD_ADDRESS, %sp
        cld
        cmpl    $0x46444b54, marker     # already in memory when started from a CD
        je      2f
        mov     $disk_packet, %si       # DL still holds the BIOS's number of the disk
        mov     $0x42, %ah
        int     $0x13
2:      mov     $0x1130, %ax            # INT 10h: where is the 8x16 font? answer in ES:BP
        mov     $6, %bh
        int     $0x10
        cli
        xor     %eax, %eax
        mov     %es, %ax
        shl     $4, %eax
        movzwl  %bp, %ebx
        add     %eax, %ebx              # EBX: linear address of the font, until main is called
        lgdtl   gdt_register
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $CODE_SELECTOR, $protected

        .align  4
disk_packet:
        .byte   16, 0
        .word   SECTORS - 1             # sectors to read
        .word   LOAD_ADDRESS + 512, 0   # to offset, segment
        .quad   1                       # from sector 1

        .org    510
        .word   0xaa55
marker: .long   0x46444b54

        .code32
protected:
        mov     $DATA_SELECTOR, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $LOAD_ADDRESS, %esp
        mov     $bss_start, %edi
        mov     $bss_end, %ecx
        sub     %edi, %ecx
        xor     %eax, %eax
        rep stosb

        # All vectors only acknowledge the interrupt: an IRQ's purpose is to wake main() from hlt. The timer also counts.
        mov     $idt, %edi
        mov     $VECTORS, %ecx
3:      mov     $acknowledge, %eax
        call    write_gate
        loop    3b
        mov     $idt + FIRST_IRQ * 8, %edi
        mov     $timer, %eax
        call    write_gate
        lidt    idt_register

        # Both interrupt controllers (8259): initialise, vectors, cascade on line 2, 8086 mode, then the masks.
        mov     $0x11, %al
        out     %al, $0x20
        out     %al, $0xa0
        mov     $FIRST_IRQ, %al
        out     %al, $0x21
        mov     $FIRST_IRQ + 8, %al
        out     %al, $0xa1
        mov     $4, %al
        out     %al, $0x21
        mov     $2, %al
        out     %al, $0xa1
        mov     $1, %al
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xf8, %al              # timer, keyboard, cascade
        out     %al, $0x21
        mov     $0xef, %al              # PS/2 mouse (IRQ 12)
        out     %al, $0xa1
        push    %ebx
        call    main                    # never returns

# An interrupt gate at EDI for the routine at EAX; EDI moves on to the next gate.
write_gate:
        mov     %ax, (%edi)
        movl    $(0x8e00 << 16) | CODE_SELECTOR, 2(%edi)
        movb    $0, 4(%edi)
        shr     $16, %eax
        mov     %ax, 6(%edi)
        add     $8, %edi
        ret

timer:
        incl    ticks
acknowledge:
        push    %eax
        mov     $0x20, %al
        out     %al, $0xa0
        out     %al, $0x20
        pop     %eax
        iret

        .align  8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # code: base 0, 4 GiB
        .quad   0x00cf93000000ffff      # data: base 0, 4 GiB
gdt_register:
        .word   . - gdt - 1
        .long   gdt
idt_register:
        .word   VECTORS * 8 - 1
        .long   idt

        .globl  ticks
        .comm   ticks, 4, 4
        .comm   idt, VECTORS * 8, 8
